"""The dummy loss of absent modalities, gradient norms and drift of patch embeds."""
