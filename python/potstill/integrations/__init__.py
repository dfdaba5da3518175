"""Adapters to trainers. Each module imports the library it serves, so import the one you need."""
