"""On-disk formats: safetensors, HuggingFace folders, tokenizer, the hub, PEFT adapters."""
