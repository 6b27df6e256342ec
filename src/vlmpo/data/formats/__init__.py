"""Parsers of records into PreferencePairs, one a format.

A parser is a pure function of one record and its context. ``detect`` lists the formats and finds that of a data set;
``as_pairs`` reads any sequence of records through them.
"""

from vlmpo.data.formats.base import Format, RecordContext
from vlmpo.data.formats.detect import AUTO, FORMATS, Recognised, recognise
from vlmpo.data.formats.sequence import RecordPairs, as_pairs

__all__ = ["AUTO", "FORMATS", "Format", "RecordContext", "RecordPairs", "Recognised", "as_pairs", "recognise"]
