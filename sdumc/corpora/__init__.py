"""Corpora in the forms in which people hold them: raw distributions, feature pickles, feature folders."""
