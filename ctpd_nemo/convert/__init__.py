"""Hugging Face folders to Megatron-Core models and back.

``architecture`` reads what a folder's ``config.json`` says, through the ``families`` that are known. ``layout`` is the
one table that says of which rows of which Hugging Face tensors each Megatron parameter is made; ``load`` reads it
forwards, ``export`` backwards. ``safetensors_folder`` is the border to the weight files, ``fingerprint`` names their
content.
"""
