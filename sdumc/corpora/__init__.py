"""Importers of corpora: raw distributions, feature pickles, feature folders; :mod:`.importing` drives them all."""
