"""Measures of finished models: what a picture shows, how near it is to another, and whose name it carries."""
