"""What Celery prints of settings holds no secret of ours; what is not ours it prints as it does."""

from __future__ import annotations

from celery import Celery

from celery_kafka_backend.reports import keep_secrets


def test_reports_keep_our_secrets_and_show_the_rest() -> None:
    app = Celery("proj", broker="redis://:hunter1@b/0", set_as_current=False)
    app.conf.result_backend = "kafka://u:hunter2@h/?view=redis://:hunter3@h/0&view=mongodb%3A%2F%2Fu%3Ahunter4%40h%2Fx"
    app.conf.redis_password = "hunter5"
    app.conf.kafka_backend_settings = {
        "views": ["redis://:hunter6@h/0", "sqlite:///x.db"],
        "client": {"sasl.username": "u", "sasl.oauthbearer.config": "a=hunter7"},
        "view_options": {"elasticsearch": {"basic_auth": ("u", "hunter8")}},
        "chord_key": "hunter9",
        "claim_check": "s3://key:hunter10@bucket",
        "topic_prefix": "shop",
        "sasl.oauthbearer.config": "not a setting of ours: hunter11",
    }
    keep_secrets()
    keep_secrets()
    table = app.conf.table()
    said = app.bugreport() + repr(table)
    assert "hunter" not in said
    assert table["kafka_backend_settings"] == {
        "views": ["redis://:**@h/0", "sqlite:///x.db"],
        "client": {"sasl.username": "********", "sasl.oauthbearer.config": "********"},
        "view_options": {"elasticsearch": {"basic_auth": "********"}},
        "chord_key": "********",
        "claim_check": "s3://key:**@bucket",
        "topic_prefix": "shop",
        "sasl.oauthbearer.config": "********",
    }
    assert app.conf.kafka_backend_settings["chord_key"] == "hunter9"


def test_what_is_not_ours_is_shown_as_celery_shows_it() -> None:
    keep_secrets()
    app = Celery("proj", backend="redis://:hunter2@h/0", set_as_current=False)
    assert app.conf.table()["result_backend"] == "redis://:********@h/0"
