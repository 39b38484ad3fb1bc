"""Refusals: is an answer one, of which kind, and what a taxonomy calls the kinds.

After "Cannot or Should Not?" (von Recum and others, arXiv 2412.16974): refusals fall into two families, what a model
*cannot* do and what it *should not*; two regressions on features of the texts, first refusal or not, then the
category. The features are an embedding model's or n-grams; the categories are a file's.
"""

from redflag.lab.refusals.classifier import Judged, RefusalClassifier
from redflag.lab.refusals.phrases import PhraseClassifier
from redflag.lab.refusals.taxonomy import Taxonomy, load_taxonomy

__all__ = ["Judged", "PhraseClassifier", "RefusalClassifier", "Taxonomy", "load_taxonomy"]
