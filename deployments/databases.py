"""Make the databases of PREFECT_SERVER_DATABASE_CONNECTION_URL and MLFLOW_BACKEND_STORE_URI, if they are missing.

    python deployments/databases.py

MLflow's tables are made or brought up to date here, because its server refuses tables of an older version; Prefect's
server does that by itself. The password is PGPASSWORD. Run it as often as you like.
"""

import os
import sys

from mlflow.db import upgrade
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import OperationalError


def create(url: str) -> None:
    """Make the database that a URL names, on the server that it names."""
    target = make_url(url)
    server = create_engine(target.set(drivername="postgresql+psycopg2", database="postgres"))
    with server.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        exists = connection.execute(text("SELECT 1 FROM pg_database WHERE datname = :name"), {"name": target.database})
        if exists.first() is None:
            quoted = server.dialect.identifier_preparer.quote_identifier(str(target.database))
            connection.execute(text(f"CREATE DATABASE {quoted}"))
            print(f"made the database {target.database}")


def main() -> int:
    """Both databases; returns the exit status."""
    mlflow = os.environ["MLFLOW_BACKEND_STORE_URI"]
    try:
        create(os.environ["PREFECT_SERVER_DATABASE_CONNECTION_URL"])
        create(mlflow)
    except OperationalError as error:
        print(f"PostgreSQL refuses: {error.orig}", file=sys.stderr)
        print("A password that was changed in .env has to be changed in PostgreSQL, too (ALTER ROLE).", file=sys.stderr)
        return 1
    upgrade.callback(mlflow)
    return 0


if __name__ == "__main__":
    sys.exit(main())
