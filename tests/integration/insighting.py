"""An insight processor as a plain Faust worker sees it: ``python -m faust -A tests.integration.insighting worker --without-web``.

The environment says which Kafka (``INSIGHT_KAFKA``), prefix (``INSIGHT_PREFIX``) and view (``INSIGHT_VIEW``).
"""

from __future__ import annotations

import os

from celery_kafka_backend.processors.insight import insight_app
from celery_kafka_backend.sinks.contract import StoreOptions
from tests.integration.materializing import settings

_view, _prefix = os.environ["INSIGHT_VIEW"], os.environ["INSIGHT_PREFIX"]
app = insight_app(settings(os.environ["INSIGHT_KAFKA"], _prefix, _view), _view, StoreOptions(namespace=_prefix))
