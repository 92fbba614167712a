<?php
/*
 * A microservice in PHP that implements a task: taskd posts the params as JSON, the JSON of the answer is the result.
 *
 *     php -S 127.0.0.1:8765 handler.php
 *     taskd submit --http http://127.0.0.1:8765/execute --params '{"text": "some words"}' --wait
 *
 * Any status of 200 to 299 is success; anything else makes the attempt fail, with the error of the body.
 */

declare(strict_types=1);

interface TaskHandler
{
    public function execute(array $params): mixed;
}

final class Digest implements TaskHandler
{
    public function execute(array $params): mixed
    {
        if (!is_string($params['text'] ?? null)) {
            throw new InvalidArgumentException('text must be a string');
        }
        return ['length' => mb_strlen($params['text']), 'sha256' => hash('sha256', $params['text'])];
    }
}

header('Content-Type: application/json');
try {
    $params = json_decode(file_get_contents('php://input'), true, 32, JSON_THROW_ON_ERROR);
    // X-Taskd-Fence names this attempt, and no other attempt ever has the same.
    echo json_encode((new Digest())->execute($params), JSON_THROW_ON_ERROR);
} catch (Throwable $error) {
    http_response_code($error instanceof InvalidArgumentException || $error instanceof JsonException ? 400 : 500);
    echo json_encode(['error' => ['type' => get_class($error), 'message' => $error->getMessage()]]);
}
