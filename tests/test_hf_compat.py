"""Private names of other libraries: each exists, and none is used without being listed here."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import inspect
import pkgutil
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
# `module:name` or `module:Class.name` of each, with the parameters that are relied on. Those of base classes are used
# by our subclasses, the others in the package's `hf_compat` only.
PRIVATE_NAMES: dict[str, dict[str, tuple[str, ...]]] = {
    "umbrella_data": {"torch._C:_disabled_torch_function_impl": ()},
    "umbrella_model": {
        "torch:_assert_async": (),
        "transformers:PreTrainedConfig._attn_implementation": (),
        "transformers:PreTrainedModel._init_weights": ("module",),
        "transformers:PreTrainedModel._is_hf_initialized": (),
        "transformers:PreTrainedModel._no_split_modules": (),
        "transformers:PreTrainedModel._tied_weights_keys": (),
    },
    "umbrella_train": {
        "accelerate:Accelerator._is_accelerate_prepared": (),
        "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3._get_param_partition_rank": ("param",),
        "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3._z3_optimizer": (),
        "torch.distributed.distributed_c10d:_get_default_store": (),
        "torch.optim.lr_scheduler:LRScheduler._last_lr": (),
        "torch:_foreach_mul_": (),
        "torch:_foreach_norm": (),
        "transformers.integrations.deepspeed:_hf_deepspeed_config_weak_ref": (),
        "transformers:Trainer._get_grad_norm": ("model", "grad_norm"),
        "transformers:Trainer._globalstep_last_logged": (),
        "transformers:Trainer._initial_global_step": (),
        "transformers:Trainer._load_from_checkpoint": ("resume_from_checkpoint", "model"),
        "transformers:Trainer._prepare_inputs": ("inputs",),
        "transformers:Trainer._save_checkpoint": ("model", "trial"),
        "transformers:Trainer._total_loss_scalar": (),
        "transformers:Trainer._tr_loss": (),
        "transformers:Trainer._train_batch_size": (),
        "transformers:TrainingArguments._n_gpu": (),
    },
}
LISTED = [(package, name) for package, table in PRIVATE_NAMES.items() for name in table]
# Of the standard library, which has no public name for them.
STANDARD_LIBRARY = ("os._exit", "parser._actions", "argparse._SubParsersAction")
# Functions that take a name as text.
BY_TEXT = ("getattr", "hasattr", "setattr", "delattr", "__setattr__", "attrgetter", "import_module")
# Libraries whose classes have private attributes that a subclass could override by accident.
LIBRARIES = ("accelerate", "deepspeed", "monai", "torch", "transformers")


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def _last(name: str) -> str:
    """The private attribute at the end of an entry of a table."""
    return re.split(r"[:.]", name)[-1]


def private_problem(name: str, parameters: tuple[str, ...]) -> str | None:
    """What is missing of an entry of a table; None if it is as we need it."""
    module, _, path = name.partition(":")
    owner: Any = importlib.import_module(module)
    *parents, attribute = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    found = getattr(owner, attribute, None)
    if found is None and not hasattr(owner, attribute):
        # Set by a method.
        is_set = inspect.isclass(owner) and any(
            re.search(rf"\b{attribute}\b", _source(base)) for base in owner.__mro__[:-1]
        )
        return None if is_set else f"{name} is gone"
    missing = set(parameters) - (set(inspect.signature(found).parameters) if parameters else set())
    return f"{name} has no parameter {', '.join(sorted(missing))}" if missing else None


@pytest.mark.parametrize(("package", "name"), LISTED)
def test_private_name_exists(package: str, name: str) -> None:
    library = name.partition(":")[0].partition(".")[0]
    if library == "deepspeed":
        pytest.importorskip("deepspeed")
    problem = private_problem(name, PRIVATE_NAMES[package][name])
    needed_by = [str(path.relative_to(ROOT)) for path in _files(package) if _last(name) in path.read_text("utf-8")]
    version = importlib.metadata.version(library)
    assert problem is None, f"{library} {version}: {problem}; it is needed by {', '.join(needed_by)}"


@pytest.mark.parametrize(
    ("name", "parameters"), [("transformers:Trainer._gone", ()), ("transformers:Trainer._save_checkpoint", ("gone",))]
)
def test_private_name_that_is_gone_is_reported(name: str, parameters: tuple[str, ...]) -> None:
    problem = private_problem(name, parameters)
    assert problem is not None
    assert name in problem


def _files(package: str) -> list[Path]:
    return sorted((ROOT / "packages" / package.replace("_", "-") / "src").rglob("*.py"))


def foreign_uses(source: str) -> list[str]:
    """Private names in a module that are not those of `self`, `cls` and `super()`, see `inherited_uses`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and _is_private(node.attr):
            if ast.unparse(node.value) not in ("self", "cls", "super()") and ast.unparse(node) not in STANDARD_LIBRARY:
                found.append(ast.unparse(node))
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            found += [name for name in names if any(map(_is_private, name.split(".")))]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in BY_TEXT:
            texts = [str(each.value) for each in node.args if isinstance(each, ast.Constant)]
            found += [text for text in texts if any(map(_is_private, text.split(".")))]
    return found


@pytest.mark.parametrize("package", PRIVATE_NAMES)
def test_private_names_of_others_are_only_used_in_hf_compat(package: str) -> None:
    found = {
        str(path.relative_to(ROOT)): uses
        for path in _files(package)
        if path.name != "hf_compat.py" and (uses := foreign_uses(path.read_text("utf-8")))
    }
    assert found == {}


@pytest.mark.parametrize("package", PRIVATE_NAMES)
def test_private_names_in_hf_compat_are_listed_and_listed_ones_are_used(package: str) -> None:
    (module,) = (path for path in _files(package) if path.name == "hf_compat.py")
    used, listed = (
        {part for name in names for part in re.split(r"[:.]", name) if _is_private(part)}
        for names in (foreign_uses(module.read_text("utf-8")), PRIVATE_NAMES[package])
    )
    assert used.union(*map(inherited_uses, _classes(package))) == listed


@pytest.mark.parametrize(
    "line",
    [
        "from transformers.trainer import _is_peft_model",
        "import torch._dynamo",
        "from torch._dynamo import config",
        "torch._assert_async(x, '')",
        "norms = torch._foreach_norm(x)",
        "model._is_accelerate_prepared = True",
        "scheduler._last_lr = rates",
        "rank = shard._z3_optimizer.rank",
        "hasattr(shard, '_z3_optimizer')",
        "getattr(model, '_dtype', None)",
        "operator.attrgetter('optimizer._z3')(shard)",
        "importlib.import_module('torch._dynamo')",
        "self._trainer._tr_loss.fill_(0)",
    ],
)
def test_private_name_of_another_library_is_found(line: str) -> None:
    assert foreign_uses(line)


def _classes(package: str) -> Iterator[type]:
    for info in pkgutil.walk_packages([str(ROOT / "packages" / package.replace("_", "-") / "src")]):
        if info.name.startswith(package) and not info.name.endswith("__main__"):
            module = importlib.import_module(info.name)
            for value in vars(module).values():
                if inspect.isclass(value) and value.__module__ == info.name:
                    yield value


def inherited_uses(kind: type) -> set[str]:
    """Private attributes of a library's class that one of our subclasses overrides, calls or sets."""
    bases = [base for base in kind.__mro__ if base.__module__.partition(".")[0] in LIBRARIES]
    foreign: set[str] = set()
    for base in bases:
        foreign |= set(vars(base)) | set(vars(base).get("__annotations__", ()))
        foreign |= set(re.findall(r"\bself\.(_\w+)", _source(base)))
    if not bases:
        return set()
    used = set(
        re.findall(r"\b(?:self|cls|super\(\))\.(_\w+)|\bdef (_\w+)|^    (_\w+)\b.*=", _source(kind), re.MULTILINE)
    )
    return {name for names in used for name in names if _is_private(name) and name in foreign}


@cache
def _source(kind: type) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):  # made by a decorator
        return ""


@pytest.mark.parametrize("package", PRIVATE_NAMES)
def test_private_attributes_of_base_classes_are_listed(package: str) -> None:
    listed = {_last(name) for name in PRIVATE_NAMES[package]}
    kinds = list(_classes(package))
    assert len(kinds) > 10
    found = {kind.__qualname__: names for kind in kinds if (names := inherited_uses(kind) - listed)}
    assert found == {}
