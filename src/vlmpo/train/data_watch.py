"""Notice that a run has nothing, or too little, left to train on, from the counts of each optimizer step.

The counts are those of all ranks, so all ranks come to the same result.
"""

from __future__ import annotations

import math

# Reasons of records whose files were there when the data were opened, and cannot be read now.
MEDIA_REASONS = frozenset({"missing_image", "undecodable_image", "missing_video", "undecodable_video", "file_changed"})
GRACE = 1000  # records that are read before the share of failures counts
IN_A_ROW = 50  # failures without a usable pair between them: the files are gone
AT_THE_END = 10  # likewise, over the last half of the last epoch


class DataWatch:
    """Counts what training reads, and finds the fault that should end the run.

    Args:
        max_bad_share: share of the records whose media may fail; 1: any.
    """

    def __init__(self, max_bad_share: float) -> None:
        self.max_bad_share = max_bad_share
        self._records = self._usable = self._failed = 0  # in this process's training
        self._in_a_row = 0  # failures since the last usable pair
        self._epoch = -1
        self._epoch_records = self._epoch_usable = 0
        self._whole = False  # whether the epoch under way was read from its first pair

    def see(self, *, records: int, usable: int, failed: int, epoch: float) -> str | None:
        """Count an optimizer step; return the fault that should end the run before it is made, or None.

        Args:
            records: records that the step read, usable or not.
            usable: pairs among them to train on.
            failed: those whose image, video or data file cannot be read any more.
            epoch: epochs done before the step.
        """
        empty = None
        if math.floor(epoch) != self._epoch:
            empty = self._empty_epoch()
            self._whole = float(epoch).is_integer()
            self._epoch, self._epoch_records, self._epoch_usable = math.floor(epoch), 0, 0
        self._records += records
        self._usable += usable
        self._failed += failed
        self._epoch_records += records
        self._epoch_usable += usable
        self._in_a_row = 0 if usable else self._in_a_row + failed
        return empty or self._failing()

    def finish(self, epoch: float) -> str | None:
        """Return the fault found at the end of training, ``epoch`` epochs done, or None."""
        gone = self._in_a_row >= AT_THE_END and 2 * self._in_a_row >= self._epoch_records
        if gone and self._tolerates_less_than_all:
            return f"the files of the last {self._in_a_row} records before the end cannot be read any more"
        # Of an epoch that ends early, or that a resumed run entered in the middle, the rest may be good.
        return self._empty_epoch() if float(epoch).is_integer() or not self._usable else None

    @property
    def _tolerates_less_than_all(self) -> bool:
        return self.max_bad_share < 1.0

    def _empty_epoch(self) -> str | None:
        if self._whole and self._epoch_records and not self._epoch_usable:
            return f"nothing to train on: none of the {self._epoch_records} records of an epoch can be used"
        return None

    def _failing(self) -> str | None:
        if not self._tolerates_less_than_all:
            return None
        if self._in_a_row >= IN_A_ROW:
            return f"the files of {self._in_a_row} records one after the other cannot be read any more"
        if self._records >= GRACE and self._failed > self.max_bad_share * self._records:
            share = f"{self._failed / self._records:.1%}"
            return (
                f"the files of {self._failed} of {self._records} records cannot be read any more: {share}, and "
                f"data.max_bad_share allows {self.max_bad_share:.4g}"
            )
        return None
