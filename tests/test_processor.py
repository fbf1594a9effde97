"""What the processor is called, and who made it."""

from pathlib import Path

import pytest

from tidaldecode import processor

INTEL = "processor\t: 0\nvendor_id\t: GenuineIntel\nmodel name\t: Intel(R) Xeon(R) Processor\n"
AMD = "processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel name\t: AMD EPYC\n"


@pytest.mark.parametrize(
    "told, name, intel",
    [(INTEL, "Intel(R) Xeon(R) Processor", True), (AMD, "AMD EPYC", False), (None, "", False)],
)
def test_the_system_is_asked(told, name, intel, monkeypatch):
    def read(self, **_):
        if told is None:
            raise FileNotFoundError(self)
        return told

    monkeypatch.setattr(Path, "read_text", read)
    monkeypatch.setattr(processor.platform, "processor", lambda: "")
    monkeypatch.setattr(processor.platform, "machine", lambda: "")
    assert processor.processor_name.__wrapped__() == name
    assert processor.is_intel.__wrapped__() is intel
