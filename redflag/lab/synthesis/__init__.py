"""Rows from a constitution: harmful and harmless classes in words -> requests, answers, onsets, soft targets.

After "Constitutional Classifiers" (Sharma and others, arXiv 2501.18837): what shall be caught is written down, a model
writes requests and answers for it, a judge checks them and finds where harm begins. To aim the detector at something
else, change the text and train again.

    constitution  the classes, from a YAML file
    wording       what a model is asked
    questions     a question, its answer, and the file that keeps answers
    endpoint      ... of an OpenAI-compatible server, at a pace (`pace`)
    local         ... of a model in this process, or of any backend
    requests      requests of a class: from templates, or written by the model
    dedup         equal and nearly equal texts
    quality       what is wrong with an answer
    augment       paraphrases, translations, disguises, typing errors
    onset         the first sentence at which a judge finds harm
    forecast      how probably an answer turns out harmful, at each of its sentences
    cost          what all this will take, before it begins
    pipeline      the steps one after the other
    run           the verb
"""
