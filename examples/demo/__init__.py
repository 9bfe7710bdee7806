"""The demo: fine-tune a pretrained sentence encoder with a head alone, with LoRA and with TuckA."""
