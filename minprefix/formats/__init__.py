"""On-disk formats: safetensors, HuggingFace folders, tokenisers, the hub, prefix files, PEFT adapters."""
