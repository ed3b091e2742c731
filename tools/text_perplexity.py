"""Perplexity of fifty everyday sentences: what training on scans does to a language model's ability to write text.

    python tools/text_perplexity.py HuggingFaceTB/SmolLM2-135M-Instruct RUN/model ...

Each name is a language model or a model of `umbrella-train`. The perplexity is exp of the mean negative log-likelihood
of all tokens but the first of each sentence. The first model is the reference of the last column.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from umbrella_model import UmbrellaConfig, UmbrellaForConditionalGeneration

SENTENCES = """\
The train to the coast leaves twice an hour, except on Sundays.
She put the kettle on and looked out of the kitchen window.
Water boils at a lower temperature on top of a high mountain.
The committee will publish its report at the end of the month.
He had forgotten his umbrella again, and it was raining hard.
Most birds of this region fly south before the first frost.
Please sign the form on the second page and return it by mail.
The old bridge was closed for repairs during the whole summer.
Our neighbours have a dog that barks whenever the bell rings.
The museum shows paintings from the early nineteenth century.
A triangle with three equal sides has three equal angles.
They walked along the river until it was too dark to see.
The price of bread rose by five percent within a year.
My grandmother taught me how to knit when I was seven.
The doctor listened to his heart and asked about his sleep.
In winter the lake freezes, and children skate across it.
The library opens at nine and closes at six in the evening.
Light travels faster than sound, so we see lightning first.
The recipe needs two eggs, a cup of sugar and some butter.
After the concert, the audience stood and clapped for minutes.
The company moved its offices to a building near the station.
Nobody knew who had left the letter on the table.
The moon turns around the earth in about four weeks.
He speaks French fluently but has never been to Paris.
The farmer sold his apples at the market in the next town.
Scientists measured the temperature of the sea for ten years.
The bus was so full that we had to wait for the next one.
You should drink more water when the weather is hot.
The film was long, but the ending made up for it.
A red car stopped in front of the school this morning.
The brain is protected by the skull and by several membranes.
Her brother works as an engineer in a small company.
The meeting was moved to Thursday because of the holiday.
We planted tomatoes and beans behind the house in May.
The telephone rang three times before anybody answered.
Many people believe that the city was founded by sailors.
The nurse changed the bandage and wrote down the time.
It takes about an hour to reach the summit from here.
The book tells the story of two sisters and a lost key.
Iron rusts when it is exposed to air and water.
The judge asked the witness to repeat the answer.
Every evening he reads the newspaper on the balcony.
The cat slept on the warm stones until noon.
Students can borrow up to ten books for four weeks.
The wind was strong enough to break the old fence.
A good map would have saved us a lot of trouble.
The patient was asked to lie still during the scan.
The shop around the corner sells fresh fish on Fridays.
She counted the coins twice and put them into a jar.
Without a warning, the lights in the hall went out.
""".splitlines()


@torch.no_grad()
def perplexity(name: str) -> float:
    """Perplexity of the sentences under one model."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    is_ours = isinstance(AutoConfig.from_pretrained(name), UmbrellaConfig)
    model_class: Any = UmbrellaForConditionalGeneration if is_ours else AutoModelForCausalLM
    model = model_class.from_pretrained(name, dtype=torch.float32).eval()
    total, count = 0.0, 0
    for sentence in SENTENCES:
        tokens = tokenizer(sentence, add_special_tokens=False, return_tensors="pt")["input_ids"]
        scores = model(input_ids=tokens).logits[0, :-1].log_softmax(dim=-1)
        total -= float(scores.gather(1, tokens[0, 1:, None]).sum())
        count += tokens.shape[1] - 1
    return math.exp(total / count)


def main() -> None:
    """Print one line for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    values = [(name, perplexity(name)) for name in parser.parse_args().models]
    for name, value in values:
        print(f"{value:10.2f}  {value / values[0][1]:6.3f} times the first  {name}")


if __name__ == "__main__":
    main()
