// What the server tells of its stages (`/pipeline`), in words and as what has changed since.

const SLACK = 0.5; // seconds, of clocks and rounding

export function proof(stage) {
  if (stage.ignores_measurements)
    return {
      grade: "poor",
      what: "Measurements ignored",
      how: "The manifest pins what has to run there, and development mode was told not to compare it.",
    };
  switch (stage.evidence) {
    case "nitro":
      return {
        grade: "good",
        what: "Attested by AWS Nitro",
        how: "A document signed for this very connection names the image that runs; it is the one the manifest pins.",
        mark: stage.measurement,
      };
    case "key_only":
      return {
        grade: "fair",
        what: "Key only",
        how: "It holds the key that the manifest names. What code runs there is not proved: its owner can read along.",
      };
    case "dev":
      return {
        grade: "poor",
        what: "Development evidence",
        how: "Signed by a local development authority: whoever runs the machine can read along.",
      };
    case null:
    case undefined:
      return { grade: "none", what: "Nothing proved yet", how: "No connection stands." };
    default:
      return { grade: "fair", what: `Evidence: ${stage.evidence}`, how: "See the server's manual.", mark: stage.measurement };
  }
}

// What has happened between two looks, `seconds` apart, in the order to be told in.
export function changes(before, now, seconds) {
  if (!before) return now.is_ready ? [{ kind: "good", text: "All stages are there." }] : [];
  const told = [];
  if (before.is_ready && !now.is_ready) told.push({ kind: "poor", text: `${gone(before, now)}; answers wait.` });
  const { num_failovers, num_running, recovery_seconds } = now.engine;
  if (num_failovers > before.engine.num_failovers) {
    // Whoever is new has shaken hands since the loss; the others kept their connections.
    const since = recovery_seconds + seconds + SLACK;
    const fresh = now.stages.filter((stage) => stage.handshake_age_seconds !== null && stage.handshake_age_seconds < since);
    const who = fresh.length ? named(now, fresh, "was", "were") : "A connection was";
    const is = fresh.length > 1 ? "are" : "is";
    const kept = num_running ? `; ${count(num_running, "answer")} went on` : "";
    told.push({ kind: "failover", text: `${who} lost and ${is} back: ${recovery_seconds.toFixed(2)} s${kept}.` });
  } else if (now.is_ready && !before.is_ready) {
    told.push({ kind: "good", text: "All stages are there." });
  }
  return told;
}

// What tells a stage from all others, of every pipeline.
export const key = (stage) => `${stage.replica}.${stage.stage_idx}`;

// Those that have left. Stages that are still there go back a few tokens, and are not ready either.
function gone(before, now) {
  const ages = new Map(before.stages.map((stage) => [key(stage), stage.handshake_age_seconds]));
  const isNew = (stage) => stage.state === "down" || stage.handshake_age_seconds < ages.get(key(stage));
  const found = now.stages.filter(isNew);
  return found.length ? `${named(now, found, "is", "are")} away` : "A connection is lost";
}

function named(view, stages, one, several) {
  const isAlone = view.replicas.length === 1;
  const name = (stage) => (isAlone ? `${stage.stage_idx}` : `${stage.stage_idx} of replica ${stage.replica}`);
  const numbers = stages.map(name).join(", ");
  return stages.length === 1 ? `Stage ${numbers} ${one}` : `Stages ${numbers} ${several}`;
}

export function trouble(view) {
  if (view.is_ready) return "";
  const away = view.stages.filter((stage) => stage.state === "down");
  return away.length ? `${named(view, away, "is", "are")} away` : "The pipeline is being mended";
}

export const count = (number, what) => `${number} ${what}${Number(number) === 1 ? "" : "s"}`;
export const percent = (share) => `${Math.round(100 * share)} %`;

export function bytes(value) {
  for (const unit of ["B", "kB", "MB"]) {
    if (value < 1000) return `${unit === "B" || value >= 100 ? value.toFixed(0) : value.toFixed(1)} ${unit}`;
    value /= 1000;
  }
  return `${value.toFixed(1)} GB`;
}

export function age(seconds) {
  if (seconds < 100) return `${seconds.toFixed(0)} s`;
  return seconds < 6000 ? `${(seconds / 60).toFixed(0)} min` : `${(seconds / 3600).toFixed(0)} h`;
}

export const ms = (value) => (value < 10 ? value.toFixed(2) : value.toFixed(1));
