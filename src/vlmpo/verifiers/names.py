"""Tells names with initials from options with their texts: "E. coli" and "J. Smith" from "B. blue"."""

from __future__ import annotations

import re

from vlmpo.verifiers.languages import word_set

# Latin names of species end so, or are these.
_SPECIES = re.compile(
    r"(?:melanogaster|rex|pombe|rerio|mays|difficile|sapiens|[a-z]+(?:oides|ata|ica|osa|ana|ans|i|ae|is|us|um))"
    r"(?: [a-z]+)?"
)
_SURNAME = re.compile(
    r"(?:Mc|Mac|O')[A-Z]\w+|[A-Z][a-z]+(?:son|stein|berg|mann?|sk[iy]|ova?|eva?|ez|feld|ford|worth|wood|field|shaw|well|bert)"
)
_SURNAMES = word_set(
    "Smith Jones Williams Brown Davis Miller Moore Taylor Thomas White Harris Martin Garcia Clark Lewis Lee "
    "Walker Hall Allen Young King Wright Scott Green Baker Adams Nelson Hill Campbell Mitchell Roberts Carter "
    "Phillips Evans Turner Parker Collins Edwards Stewart Morris Murphy Cook Rogers Reed Bailey Bell Cooper "
    "Cox Ward Brooks Kelly Price Ross Hughes Lincoln Einstein Newton Darwin Curie Tesla Obama Trump Biden "
    "Bush Clinton Kennedy Reagan Nixon Roosevelt Jefferson Churchill Shakespeare Dickens Austen Tolstoy Wells "
    "Doyle Christie Orwell Hemingway Twain Poe Doe Nguyen Kim Park Chen Wang Li Zhang Liu Singh Patel Khan "
    "Kumar Turing Gauss Euler Bohr Planck Fermi Hawking Galilei Mozart Bach Beethoven Chopin Picasso Monet "
    "Dali Freud Marx Merkel Gandhi Mandela Musk Gates Jobs Bezos Zuckerberg "
    "Franklin Hamilton Grant Lovelace Hopper Dumas Hugo Verne Camus Kafka Mann Schmidt Müller Schneider "
    "Fischer Weber Meyer Wagner Becker Hoffmann Dupont Bernard Dubois Silva Santos Souza Costa Lopez Perez "
    "Cruz Flores Diaz Hernandez Washington Edison Faraday Maxwell Pasteur Mendel Watson Crick Descartes Kepler"
)
_INITIALS = re.compile(r"[A-Z]\.(?:\s|$)|[A-Z]\. ?[A-Z]")


def is_name(text: str) -> bool:
    """Return whether ``text`` is a name with initials: "E. coli", "J. Smith", "H. G. Wells"."""
    initial = re.fullmatch(r"[A-Z]\. ?(?P<rest>[^\W\d_].*)", text)
    if not initial:
        return False
    rest = initial["rest"].strip(" .")
    if re.fullmatch("[A-Za-z]", rest) or _INITIALS.match(initial["rest"]) or _SPECIES.fullmatch(rest):
        return True
    capitals = rest.split()
    if len(capitals) > 3 or not all(
        word[:1].isupper() or word in ("van", "von", "de", "der", "da") for word in capitals
    ):
        return False
    return any(word in _SURNAMES or _SURNAME.fullmatch(word) for word in capitals)
