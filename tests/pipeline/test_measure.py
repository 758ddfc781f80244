"""Measuring on a text: the measure of the settings is taken, on the same blocks, as when it is called directly."""

import pytest

from mixbits.errors import SpecError
from mixbits.lm.checkpoint import load_model
from mixbits.lm.corpus import encode_file, token_batches
from mixbits.pipeline.measure import MEASURE_NAMES, measure_sensitivities, measure_stream
from mixbits.pipeline.settings import MeasureSettings
from mixbits.quant.measures import MEASURES
from mixbits.quant.units import find_units
from mixbits.spec import BitAllocation, QuantSpec, parse_specs


@pytest.mark.parametrize("name", MEASURE_NAMES)
def test_measures_of_a_text(name, trained, texts):
    model, tokenizer = load_model(trained)
    inventory = find_units(model)
    text = texts / "test.txt"
    around = BitAllocation({u.name: QuantSpec(4) for u in inventory.units})
    settings = MeasureSettings(measure=name, num_probes=2, num_blocks=5, specs=("1", "4"), seed=3)
    stream = encode_file(tokenizer, text)
    found = measure_stream(model, stream, settings, context=16, around=around)
    batches = token_batches(stream, context=16, num_blocks=5, micro_batch=4, seed=3)
    own = {"hessian": {"num_probes": 2, "micro_batch_size": 4}, "fisher": {}}.get(name, {"micro_batch_size": 4})
    direct = MEASURES[name](model, inventory, batches, parse_specs(["1", "4"]), seed=3, around=around, **own)
    assert found.units == direct.units
    assert found.provenance["text_sha256"] == stream.sha256
    same = measure_sensitivities(
        model, tokenizer, text, measure=name, specs=["1", "4"], num_probes=2, num_blocks=5, seed=3, around=around
    )
    assert same == found


def test_unknown_measure(trained, texts):
    with pytest.raises(SpecError, match="measure is 'prototypes'; expected one of hessian"):
        measure_sensitivities(*load_model(trained), texts / "test.txt", measure="prototypes")
