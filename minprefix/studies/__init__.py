"""The paper's studies and the bench."""
