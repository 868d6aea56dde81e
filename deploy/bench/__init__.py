"""Tokens per second of vLLM, trimtab and transformers, in one run on one machine."""
