"""Language models with the graft, under the names that people import."""
