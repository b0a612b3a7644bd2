"""`discrete-lit compare`: reports of many evaluations, to one table."""

from pathlib import Path
from typing import Any

from discrete_lit.evaluation.record_table import RecordTable, read_records


def compare(reports: list[str], output: str) -> dict[str, Any]:
    """Compare the rows of any number of reports in one table, with figures of quality against cost.

    Rows of one name are the runs of one row, whichever report they are of. Beside the mean of each distance stands its
    spread over sampling seeds of one checkpoint, and over checkpoints, such as training seeds; a gap to the best row
    that is below the spread is marked as inconclusive. The costs are those of `run.json` beside the samples: network
    calls, images/s, FLOPs, parameters; and -log p of the reports.

    Writes `comparison.md`, `comparison.html` (with figures; it needs no other file) and `comparison.json` into
    `output`, and prints the table.

    Args:
        reports: each a report.json, or a folder with some, at any depth.
        output: folder of the comparison.

    Returns:
        What `comparison.json` holds.

    Raises:
        ValueError: what is no report, or one without records; two protocols that would stand in one column.
    """
    table = RecordTable(read_records(reports))
    table.write(Path(output))
    print(f"{table.markdown()}\nComparison: {Path(output) / 'comparison.md'}, comparison.html and comparison.json")
    return table.to_dict()
