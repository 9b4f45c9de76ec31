"""What users need to test code that is built on homeloop."""
