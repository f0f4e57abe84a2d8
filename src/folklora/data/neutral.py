"""Public text: neutral English words, in the package, that belong to nobody's data."""

from __future__ import annotations

import torch

TEXT = """
    about above after again air all along also always animal answer any area around back base because before begin
    below better between big bird black blue boat body book both box bring brown build busy call carry centre certain
    change city class clear close cold colour come common complete corner country course cover cross cut dark day deep
    different door down draw dry each early earth east easy eat edge end enough even every example eye face fall far
    farm fast feel field fill final find fine fire first fish floor flower follow food foot form forward four free
    friend front full garden general give glass gold good grass great green ground group grow half hand hard head hear
    heavy high hill hold home horse hour house idea inside island keep kind know lake land large last late laugh learn
    leave left letter level light line list little live long look low machine main make many map mark material measure
    metal middle mile minute moment month moon morning most mother mountain move music name near need new next night
    north note notice number object ocean often old open order other over page paint paper part pass path pattern people
    picture piece place plain plan plant play point possible pound power present produce public pull question quick
    quiet rain reach read ready reason record red remember rest right river road rock room round rule run sail sand
    school sea season seat second see seed sentence several shape ship shop short side simple size sky sleep slow small
    snow soft soil song sound south space spring square stand star start state stay step stone stop story street strong
    summer sun surface table talk tall teach tell test thing think three time together top town trade train travel tree
    turn under unit until use valley village voice wait walk wall warm watch water wave weather week west wheel white
    whole wide wild wind window winter wish wood word work world write year yellow young
"""
WORDS = tuple(TEXT.split())


def sentences(count: int, length: int, generator: torch.Generator) -> list[str]:
    """So many texts of so many words each, drawn with the generator."""
    picks = torch.randint(len(WORDS), (count, length), generator=generator)
    return [" ".join(WORDS[i] for i in row) for row in picks.tolist()]
