"""FolkLoRA: personalised federated fine-tuning of foundation models in kilobytes a round."""

__version__ = "0.1.0"
