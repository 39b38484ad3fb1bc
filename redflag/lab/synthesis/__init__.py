"""Rows from a constitution: harmful and harmless classes in words -> requests, answers, onsets, soft targets.

After "Constitutional Classifiers" (Sharma and others, arXiv 2501.18837): the constitution describes what to detect, a
model writes requests and answers for it, a judge checks them and finds where harm begins. To detect something else,
change the text and train again.

    constitution  the classes, from a YAML file
    wording       prompts for the model
    questions     a question, its answer, and the file that caches answers
    endpoint      ... of an OpenAI-compatible server, at a pace (`pace`)
    local         ... of a model in this process, or of any backend
    requests      requests of a class: from templates, or written by the model
    dedup         equal and nearly equal texts
    quality       checks of requests and answers
    augment       paraphrases, translations, disguises, typing errors
    onset         the first sentence at which a judge finds harm
    forecast      how probably an answer turns out harmful, at each of its sentences
    cost          an estimate before the start
    pipeline      the steps one after the other
    run           the verb
"""
