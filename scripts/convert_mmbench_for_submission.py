"""Answers → the Excel table that MMBench's server takes: the questions with a column `prediction`.

Reads RESULT_DIR/EXPERIMENT.jsonl, writes UPLOAD_DIR/EXPERIMENT.xlsx.
"""

from __future__ import annotations

import argparse
import io
import re
import zipfile
from pathlib import Path
from xml.sax.saxutils import escape

from llava.atomic import atomic_write
from llava.errors import one_clear_error
from llava.eval.questions import answers_by_id, read_tsv

NOT_WANTED = {"hint", "category", "source", "image", "comment", "l2-category"}
PLACE = 6  # of the column prediction


def main(args: argparse.Namespace) -> None:
    rows = read_tsv(args.annotation_file, "index")
    answers = answers_by_id(Path(args.result_dir) / f"{args.experiment}.jsonl")
    columns = [name for name in rows[0] if name not in NOT_WANTED]
    columns.insert(PLACE, "prediction")
    table: list[list] = [columns]
    for row in rows:
        row["index"] = int(row["index"]) if row["index"].isdecimal() else row["index"]
        row["prediction"] = answers.get(row["index"], {"text": ""})["text"]
        table.append([row[name] for name in columns])
    write_xlsx(Path(args.upload_dir) / f"{args.experiment}.xlsx", table)


def write_xlsx(path: Path, table: list[list]) -> None:
    """Write a table of text and whole numbers as an Excel file (ISO 29500) of one sheet."""
    schema = "http://schemas.openxmlformats.org"
    office = f"{schema}/officeDocument/2006/relationships"
    package = f"{schema}/package/2006"
    kind = "application/vnd.openxmlformats-officedocument.spreadsheetml"

    def relation(to: str, target: str) -> str:
        one = f'<Relationship Id="r1" Type="{office}/{to}" Target="{target}"/>'
        return f'<Relationships xmlns="{package}/relationships">{one}</Relationships>'

    rows = "".join(f"<row>{''.join(map(_cell, row))}</row>" for row in table)
    parts = {
        "[Content_Types].xml": f'<Types xmlns="{package}/content-types">'
        '<Default Extension="rels" ContentType='
        '"application/vnd.openxmlformats-package.relationships+xml"/>'
        f'<Override PartName="/xl/workbook.xml" ContentType="{kind}.sheet.main+xml"/>'
        f'<Override PartName="/xl/sheet.xml" ContentType="{kind}.worksheet+xml"/></Types>',
        "_rels/.rels": relation("officeDocument", "xl/workbook.xml"),
        "xl/_rels/workbook.xml.rels": relation("worksheet", "sheet.xml"),
        "xl/workbook.xml": f'<workbook xmlns="{schema}/spreadsheetml/2006/main" '
        f'xmlns:r="{office}"><sheets><sheet name="Sheet1" sheetId="1" r:id="r1"/></sheets>'
        "</workbook>",
        "xl/sheet.xml": f'<worksheet xmlns="{schema}/spreadsheetml/2006/main">'
        f"<sheetData>{rows}</sheetData></worksheet>",
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in parts.items():
            archive.writestr(name, '<?xml version="1.0" encoding="UTF-8"?>\n' + text)
    with atomic_write(path) as file:
        file.write(buffer.getvalue())


def _cell(value: str | int) -> str:
    if isinstance(value, int):
        return f"<c><v>{value}</v></c>"
    legal = re.sub(r"[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "", value)
    text = f'<is><t xml:space="preserve">{escape(legal)}</t></is>'
    return f'<c t="inlineStr">{text}</c>' if legal else "<c/>"


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--annotation-file", required=True, help="MMBench's .tsv")
    parser.add_argument("--result-dir", required=True)
    parser.add_argument("--upload-dir", required=True)
    parser.add_argument("--experiment", required=True)
    return parser.parse_args(argv)


if __name__ == "__main__":
    with one_clear_error():
        main(arguments())
