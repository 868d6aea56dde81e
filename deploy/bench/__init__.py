"""What guidance costs: vLLM, trimtab and transformers side by side, a command for each question."""
