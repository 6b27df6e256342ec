"""Records as data sets write them, into PreferencePairs: which format it is, and one parser a format.

A parser is a pure function of one record and where it stands. ``registry`` lists the formats and tells them apart;
``as_pairs`` reads any sequence of records through them.
"""

from vlmpo.data.formats.base import RecordContext
from vlmpo.data.formats.detect import AUTO, FORMATS, Format, Recognised, recognise
from vlmpo.data.formats.sequence import RecordPairs, as_pairs

__all__ = ["AUTO", "FORMATS", "Format", "RecordContext", "RecordPairs", "Recognised", "as_pairs", "recognise"]
