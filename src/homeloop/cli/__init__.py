"""The command `homeloop`: what a person types and sees."""
