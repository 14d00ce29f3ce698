-- Prefect makes indexes of pg_trgm, an extension that the official image has and the package of the tests has not.
-- This one in its place has no operators, so no query ever uses such an index: it only makes queries faster. A function
-- that ignores what it is given leaves the number of its keys at zero, so the index stays empty.
CREATE FUNCTION gin_extract_value_trgm(text, internal, internal) RETURNS internal
  LANGUAGE internal IMMUTABLE STRICT AS 'pg_backend_pid';
CREATE FUNCTION gin_extract_query_trgm(text, internal, int2, internal, internal, internal, internal) RETURNS internal
  LANGUAGE internal IMMUTABLE STRICT AS 'pg_backend_pid';
CREATE FUNCTION gin_trgm_consistent(internal, int2, text, int4, internal, internal, internal, internal) RETURNS bool
  LANGUAGE internal IMMUTABLE STRICT AS 'pg_backend_pid';
CREATE OPERATOR CLASS gin_trgm_ops FOR TYPE text USING gin AS
  FUNCTION 1 bttextcmp(text, text),
  FUNCTION 2 gin_extract_value_trgm(text, internal, internal),
  FUNCTION 3 gin_extract_query_trgm(text, internal, int2, internal, internal, internal, internal),
  FUNCTION 4 gin_trgm_consistent(internal, int2, text, int4, internal, internal, internal, internal),
  STORAGE text;
