"""The Gradio app: documents in, questions answered from them, with the passages that were read.

The folder is a Hugging Face Space (app.py) and, installed, the package msa_hf.space_app (`msa-hf space`).
"""
