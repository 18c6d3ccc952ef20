# SPDX-License-Identifier: Apache-2.0
"""From a photo to the codes of a generator, against the Generator protocol only.

``problem`` what is wanted (pictures, cameras, losses), ``loop`` the optimisation of codes, noise and cameras, ``tuning``
of the generator around found codes, ``terms`` losses, ``schedules`` and ``start`` what projectors share, ``noise`` their
regulariser, ``framing`` how a photo is cut, ``measure`` how good the result is, ``session`` the folder it lies in.
"""
