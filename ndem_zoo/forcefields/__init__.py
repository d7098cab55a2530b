"""Classical potentials: priors to learn the difference to, and models of what a displacement does to the forces.

``pairs`` and ``valence`` are fitted to the training forces in closed form; ``mmff94`` and ``gfn2-xtb`` are published. The
names are those of `ndem_zoo.registry.FORCE_FIELDS`; `make_force_field` reads them, sums included.
"""

from ndem_zoo.forcefields.base import ForceField, SumOfForceFields, make_force_field

__all__ = ["ForceField", "SumOfForceFields", "make_force_field"]
