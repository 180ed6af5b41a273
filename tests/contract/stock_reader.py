"""A client that has Celery and not our package: run as ``python -I stock_reader.py``, jobs as JSON on stdin."""

import json
import sys


class _Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "celery_kafka_backend":
            raise ModuleNotFoundError(name)


def _described(result) -> dict:
    value = result.result
    return {
        "state": result.state,
        "result": repr(value) if isinstance(value, BaseException) else value,
        "type": type(value).__name__,
        "traceback": result.traceback,
        "children": [child.id for child in result.children or []],
        "date_done": result.date_done and result.date_done.isoformat(),
        "name": result.name,
        "args": result.args,
        "kwargs": result.kwargs,
        "worker": result.worker,
        "retries": result.retries,
        "queue": result.queue,
    }


def main() -> None:
    """Do each job and print what a user would see."""
    sys.meta_path.insert(0, _Blocked())
    try:
        import celery_kafka_backend  # noqa: F401, PLC0415
    except ModuleNotFoundError:
        pass
    else:
        raise SystemExit("the blocker does not block")
    from celery import Celery  # noqa: PLC0415
    from celery.result import AsyncResult, GroupResult  # noqa: PLC0415

    answers = []
    for job in json.load(sys.stdin):
        app = Celery("stock", backend=job["backend"], set_as_current=False)
        app.conf.update(job["conf"])
        if "cassandra_port" in job["conf"]:
            app.backend.port = job["conf"]["cassandra_port"]  # Celery 5.4 has the setting and does not look at it
        if job.get("get"):
            print("ready", flush=True)
            answers.append(AsyncResult(job["get"], app=app).get(timeout=180))
            continue
        tasks = {task: _described(AsyncResult(task, app=app)) for task in job["tasks"]}
        groups = {}
        for group in job["groups"]:
            restored = GroupResult.restore(group, app=app)
            groups[group] = (
                restored
                if restored is None
                else [
                    child.id
                    for child in getattr(restored, "results", restored)  # Celery's MongoDB backend restores a bare list
                ]
            )
        answers.append({"tasks": tasks, "groups": groups})
    print(json.dumps(answers))


main()
