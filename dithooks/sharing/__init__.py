"""Plans to share: model cards, and repositories on the Hugging Face Hub."""
