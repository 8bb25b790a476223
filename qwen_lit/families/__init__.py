"""What each Qwen is, as plain data: nothing here imports torch. A family is one file, and its lines in ``table``."""
