"""The licences of a network that two others were made into, such as a student and the weights that it started from."""

from dataclasses import replace

from distill.export.licence_files import merged
from distill.export.licences import Licences


def together(first: Licences, second: Licences) -> Licences:
    """Both chains, each network once; files of the second are renamed where the first has others of their name."""
    texts, names = dict(first.texts), dict[str, str]()
    for name, text in second.texts.items():
        texts, (held,) = merged(texts, {name: text}, second.terms[0].network)
        names[name] = held
    terms = (
        replace(each, files=tuple(names.get(file, file) for file in each.files))
        for each in second.terms
    )
    return Licences(tuple(dict.fromkeys((*first.terms, *terms))), texts)
