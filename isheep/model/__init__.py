"""The decoder: Qwen2, Llama, Qwen3 and Mistral in one class, its weights and its adapters."""
