"""The data protocol: what of the data is recorded, and that numbers are of samples once they are read."""

from adamerge.data.protocol import protocol

from .test_base import Noise, Pictures


def test_what_is_recorded():
    data = Noise(only=["shapes"], calibration_samples=5, seed=3)
    assert protocol(data) == {
        "calibration_split": "calibration, labels never read",
        "transductive": False,
        "labelled": False,
        "shots": None,
        "calibration_samples": {"shapes": 5},
        "test_samples": {"colours": 11, "shapes": 11},
        "seed": 3,
    }
    papers = protocol(Noise(transductive=True))
    assert papers["calibration_split"] == "test, labels never read" and papers["transductive"]
    few = protocol(Noise(labelled=True, shots=1))
    assert few["calibration_split"] == "calibration, labelled" and few["labelled"] and few["shots"] == 1
    assert few["calibration_samples"] == {"colours": 3, "shapes": 4}


def test_rows_that_are_no_samples_are_counted_once_they_are_read():
    class Picky(Pictures):
        def preprocess(self, sample):
            if not self.decoded:
                self.decoded[b""] += 1
                raise ValueError("the first is broken")
            return super().preprocess(sample)

    data = Noise(unusable_share=0.1)
    assert "skipped_rows" not in data.protocol and data.protocol["calibration_samples"]["colours"] == 20
    data.serve(Picky())
    data.samples("colours", "calibration")
    assert data.protocol["skipped_rows"] == {"colours": 1}
    assert data.protocol["calibration_samples"] == {"colours": 19, "shapes": 20}
