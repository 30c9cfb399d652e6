"""Checkpoints: Hugging Face safetensors in and out, and the Hub."""
