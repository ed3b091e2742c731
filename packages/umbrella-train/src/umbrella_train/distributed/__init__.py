"""DDP, FSDP2 and DeepSpeed: what the trainer needs to know of each engine."""
