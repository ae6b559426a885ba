"""Task_vectors."""
