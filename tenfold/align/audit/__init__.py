"""Which preference labels to doubt, and how many of the doubts are more than chance (R3M specification, 2.7, 8.4)."""

from tenfold.align.audit.judging import (
    Audit,
    Group,
    Verdict,
    audit,
    audit_groups,
    cleaned_records,
    cleaned_rows,
    worst_pairs,
    write_csv,
)

__all__ = [
    "Audit",
    "Group",
    "Verdict",
    "audit",
    "audit_groups",
    "cleaned_records",
    "cleaned_rows",
    "worst_pairs",
    "write_csv",
]
