"""Trains one net on ten simulated devices, most of which cannot hold its unmodified step: each has its own plan."""

from __future__ import annotations

from fxhybrid.federated.server.policies import Settings, policy_of
from fxhybrid.federated.simulation.experiment import Experiment
from fxhybrid.federated.simulation.scenarios import Scenario

devices = Scenario("digits", n_devices=10, capable_share=0.2, skew=1.0)
driver = Experiment().driver(devices, policy_of("fxhybrid"), Settings(rounds=4, devices_per_round=4))
for record in driver.run():
    print(record)
print(f"simulated clock: {driver.clock_s:.0f} s; {dict(driver.outcomes)}")
