"""The demo checkpoint: a small GLM trained by train.py in this folder, in the published Hugging Face layout."""
