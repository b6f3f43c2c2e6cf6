"""The handler tier: instruction semantics by family of operation.

``PACKS`` names the packs that come with the project; each is the dotted name of a module of this
package whose ``PACK`` is a :class:`sandbox.handler.Pack`. Modules are imported when asked for.
"""

from __future__ import annotations
