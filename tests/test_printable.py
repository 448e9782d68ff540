"""What a terminal shows of texts that would steer it."""

import logging

from adq_train.printable import PrintableFormatter, one_line, printable


def test_what_steers_a_terminal_is_written_out():
    for evil, shown in (
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("50\r99", r"50\r99"),
        ("\x9b31m\x7f\x00", r"\x9b31m\x7f\x00"),
        ("abc\u202egpj", r"abc\u202egpj"),
    ):
        assert printable(evil) == one_line(evil) == shown


def test_what_people_write_stays():
    text = "Ω ± 0.5 → été 猫 👩‍🔬\n\tsecond line"
    assert printable(text) == text
    assert one_line(text) == text.replace("\n\t", r"\n\t")


def test_the_log_is_printable():
    record = logging.LogRecord("adq_train", logging.INFO, "", 1, "left out %s", ("\x1b[2J",), None)
    assert (
        PrintableFormatter("%(levelname)s %(message)s").format(record) == r"INFO left out \x1b[2J"
    )
