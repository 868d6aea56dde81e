"""Networks that read another vocabulary: tokens as bytes, maps between them, and retokenizing."""
