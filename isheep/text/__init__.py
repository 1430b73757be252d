"""Text: tokenizer, chat templates, seed tasks, and the prompts that the loop sends to the model."""
