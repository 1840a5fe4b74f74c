"""Words to vectors: pre-trained encoders in Flax, and their vectors kept on disk."""
